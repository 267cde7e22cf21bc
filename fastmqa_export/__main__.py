# SPDX-License-Identifier: MIT
"""``python -m fastmqa_export``."""

from fastmqa_export.cli import main

main()
