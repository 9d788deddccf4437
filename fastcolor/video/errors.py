"""What goes wrong with a film."""

from __future__ import annotations


class VideoError(Exception):
    """A film that cannot be read or written as asked. The message names the file or argument."""
