# SPDX-License-Identifier: MIT
#
# libfastmqa_trt.so, for the major version of TensorRT whose headers are found; linked with no
# TensorRT. Included by plugins/CMakeLists.txt.
find_path(tensorrt_headers NvInfer.h NO_DEFAULT_PATH NO_CACHE PATHS
  "${TENSORRT_INCLUDE_DIR}" "$ENV{TENSORRT_INCLUDE_DIR}"
  "${TENSORRT_ROOT}/include" "$ENV{TENSORRT_ROOT}/include"
  /usr/include "/usr/include/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu")
# What AUTO says and ON fails with; nothing after it is read.
macro(leave_out reason)
  if(FASTMQA_TRT STREQUAL "AUTO")
    message(STATUS "TensorRT's plugin is left out: ${reason}")
    return()
  endif()
  message(FATAL_ERROR "TensorRT's plugin cannot be built: ${reason}")
endmacro()

if(NOT tensorrt_headers)
  leave_out("its headers were not found; set TENSORRT_INCLUDE_DIR to the folder of NvInfer.h")
endif()

# From 10.13 on NV_TENSORRT_MAJOR is TRT_MAJOR_ENTERPRISE, a number.
set(version)
file(STRINGS "${tensorrt_headers}/NvInferVersion.h" defined REGEX "#define")
foreach(part MAJOR MINOR)
  if(NOT "${defined}" MATCHES "(NV_TENSORRT|TRT)_${part}(_ENTERPRISE)? ([0-9]+)")
    leave_out("${tensorrt_headers}/NvInferVersion.h states no version")
  endif()
  list(APPEND version "${CMAKE_MATCH_3}")
endforeach()
list(JOIN version "." version)
if(version VERSION_LESS 10.10)
  leave_out("${tensorrt_headers} is of TensorRT ${version}; it needs 10.10 or newer")
endif()
message(STATUS "TensorRT ${version}: its plugin is built with ${tensorrt_headers}")

# TensorRT keeps timings by this name: other kernels, another name.
file(GLOB_RECURSE kernel_sources CONFIGURE_DEPENDS
  "${CMAKE_CURRENT_SOURCE_DIR}/include/fastmqa/*.cuh" "${CMAKE_CURRENT_SOURCE_DIR}/kernels/*")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${kernel_sources})
set(hashes)
foreach(source IN LISTS kernel_sources)
  file(SHA256 "${source}" hash)
  string(APPEND hashes "${hash}")
endforeach()
string(SHA256 kernels_id "${hashes}")
string(SUBSTRING "${kernels_id}" 0 12 kernels_id)

file(GLOB sources CONFIGURE_DEPENDS
  "${CMAKE_CURRENT_LIST_DIR}/*.cpp" "${CMAKE_CURRENT_SOURCE_DIR}/op/*.cpp")
add_shared(fastmqa_trt "${CMAKE_CURRENT_LIST_DIR}/exports.map" ${sources})
target_compile_features(fastmqa_trt PRIVATE cxx_std_20)
target_include_directories(fastmqa_trt PRIVATE include)
target_include_directories(fastmqa_trt SYSTEM PRIVATE
  "${tensorrt_headers}" ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_options(fastmqa_trt PRIVATE ${cxx_options})
target_link_libraries(fastmqa_trt PRIVATE ${CMAKE_DL_LIBS})
set_target_properties(fastmqa_trt PROPERTIES CXX_VISIBILITY_PRESET hidden)
set_source_files_properties("${CMAKE_CURRENT_LIST_DIR}/attention_plugin.cpp" PROPERTIES
  COMPILE_DEFINITIONS "FASTMQA_KERNELS_ID=\"${kernels_id}\"")
