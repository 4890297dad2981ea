"""What reads trace files. The formats and their sources are listed in ``catalogue``."""
