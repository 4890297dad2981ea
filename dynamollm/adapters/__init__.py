"""What the front door reads and writes: files, environment, processes, clocks."""
