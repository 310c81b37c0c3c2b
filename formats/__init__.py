"""What the bytes mean: declarative layouts of on-disk formats and protocols. No I/O, no policy."""
