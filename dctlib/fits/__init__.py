"""The fits of a transcoder, and rival methods that find vectors."""
