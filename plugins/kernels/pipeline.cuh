// SPDX-License-Identifier: MIT
#pragma once

#include <fastmqa/tile/loader.cuh>

#include "traits.cuh"
#include "work.cuh"

namespace fastmqa {

// Feeds a block with its tiles of keys and values, each fetched as soon as its place is free.
//
// A place is free when every warp has passed the barrier after its last use. The barrier that
// makes values visible also ends the use of the keys, and the other way round, so two barriers per
// tile suffice; groups of copies alternate strictly (keys, values, keys, ...), which makes the
// number of groups that may be under way at a wait a constant.
template <class Traits>
class Pipeline {
 public:
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;
  using KeyTile = typename Traits::KeyTile;
  using ValueTile = typename Traits::ValueTile;

  __device__ __forceinline__ Pipeline(const KernelParams& p, const Work<Traits>& work,
                                      Storage& storage)
      : storage_(storage), tile_end_(work.last_tile), key_end_(work.keys.end) {
    const AttentionParams& a = p.attention;
    k_ = static_cast<const Element*>(a.k) + work.batch * a.k_strides.batch +
         work.kv_head * a.k_strides.head;
    k_stride_ = a.k_strides.row;
    k_chunks_ = a.head_size / KeyTile::kPerChunk;
    if constexpr (!Traits::kValuesInK) {
      v_ = static_cast<const Element*>(a.v) + work.batch * a.v_strides.batch +
           work.kv_head * a.v_strides.head;
      v_stride_ = a.v_strides.row;
      v_chunks_ = a.v_head_size / ValueTile::kPerChunk;
    }
  }

  // Starts the copies that the first tile needs, and those that fit besides.
  __device__ __forceinline__ void start(const KernelParams& p, const Work<Traits>& work) {
    if constexpr (Traits::kTensorCores) fetch_queries(p.attention, work);
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      fetch_keys(work.first_tile + ahead);
      if constexpr (!Traits::kValuesInK) {
        if (ahead + 1 < kAhead) fetch_values(work.first_tile + ahead);
      }
    }
  }

  // The queries, visible to the block.
  __device__ __forceinline__ const auto& await_queries() {
    if constexpr (Traits::kAsync) {
      queries_.template land<Traits::kValuesInK ? kAhead : 2 * kAhead - 1>(storage_.q);
    }
    __syncthreads();
    return storage_.q;
  }

  // The keys of a tile, visible to the block; afterwards the block is done with the last values.
  __device__ __forceinline__ const KeyTile& await_keys(int tile) {
    KeyTile& k = storage_.k[place(tile)];
    if constexpr (Traits::kValuesInK) {
      if constexpr (!Traits::kAsync || kAhead == 0) __syncthreads();  // done with the last tile
      if constexpr (kAhead == 0) fetch_keys(tile);
      keys_.template land<kAhead == 0 ? 0 : kAhead - 1>(k);
      __syncthreads();
      if constexpr (kAhead > 0) fetch_keys(tile + kAhead);
    } else {
      keys_.template land<2 * (kAhead - 1)>(k);
      __syncthreads();
      fetch_values(tile + kAhead - 1);
    }
    return k;
  }

  // The values of that tile, visible to the block, and so is what its threads wrote to shared
  // memory before; afterwards the block is done with the keys.
  __device__ __forceinline__ const ValueTile& await_values(int tile) {
    if constexpr (Traits::kValuesInK) {
      if constexpr (Traits::kSharesProbabilities) __syncthreads();
      return storage_.k[place(tile)];
    } else {
      ValueTile& v = storage_.v[place(tile)];
      values_.template land<2 * (kAhead - 1)>(v);
      __syncthreads();
      fetch_keys(tile + kAhead);
      return v;
    }
  }

 private:
  using Row = tile::SourceRow<Element>;

  // How many tiles of keys are under way or waiting when the block asks for one. Where the values
  // are in them, a tile is in use until the next is asked for, and its place cannot be one of those
  // (unless tiles wait in registers).
  static constexpr int kAhead =
      Traits::kValuesInK && Traits::kAsync ? Traits::kStages - 1 : Traits::kStages;

  __device__ __forceinline__ static int place(int tile) {
    if constexpr (Traits::kStages == 1) return 0;
    return tile % Traits::kStages;
  }

  __device__ __forceinline__ void fetch_queries(const AttentionParams& a,
                                                const Work<Traits>& work) {
    const auto* q = static_cast<const Element*>(a.q) + work.batch * a.q_strides.batch;
    queries_.issue(storage_.q, a.head_size / Traits::QueryTile::kPerChunk, [&](int row) {
      return Row{q + work.head(row) * a.q_strides.head + work.position(row) * a.q_strides.row,
                 row < work.rows};
    });
    queries_.commit();
    // Registers hold one tile at a time.
    if constexpr (!Traits::kAsync) queries_.template land<0>(storage_.q);
  }

  // Keys beyond the last one that a row sees become zeros, whatever memory holds there: a
  // probability of 0 times NaN would be NaN.
  __device__ __forceinline__ void fetch_keys(int tile) {
    if (tile < tile_end_) {
      keys_.issue(storage_.k[place(tile)], k_chunks_, [&](int row) {
        const int key = tile * Traits::kBlockKeys + row;
        return Row{k_ + key * k_stride_, key < key_end_};
      });
    }
    keys_.commit();
  }

  __device__ __forceinline__ void fetch_values(int tile) {
    if (tile < tile_end_) {
      values_.issue(storage_.v[place(tile)], v_chunks_, [&](int row) {
        const int key = tile * Traits::kBlockKeys + row;
        return Row{v_ + key * v_stride_, key < key_end_};
      });
    }
    values_.commit();
  }

  Storage& storage_;
  const int tile_end_;
  const int key_end_;
  const Element* k_;
  const Element* v_;
  int64_t k_stride_, v_stride_;
  int k_chunks_, v_chunks_;
  tile::Loader<typename Traits::QueryTile, Traits::kThreads, Traits::kAsync> queries_;
  tile::Loader<KeyTile, Traits::kThreads, Traits::kAsync> keys_;
  tile::Loader<ValueTile, Traits::kThreads, Traits::kAsync> values_;
};

}  // namespace fastmqa
