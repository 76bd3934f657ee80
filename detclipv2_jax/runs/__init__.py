"""What a run consists of: its state, optimizer, order of steps, sharding, processes, checkpoints and workdir."""
