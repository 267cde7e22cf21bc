# SPDX-License-Identifier: MIT
"""What `polygraphy plugin` looks for in a folder of that name; see `fastmqa_export.pattern`.

A folder of its own, since Polygraphy puts it first on the path that Python imports from.
"""

from fastmqa_export.pattern import get_matching_subgraphs, get_plugin_metadata, replace_with_plugin

__all__ = ["get_matching_subgraphs", "get_plugin_metadata", "replace_with_plugin"]
