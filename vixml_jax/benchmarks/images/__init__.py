"""Speed of reading, decoding and resizing image files, by threads and by processes."""
