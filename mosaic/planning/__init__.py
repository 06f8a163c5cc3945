"""What a run will cost before it starts: FLOPs, memory, time, disk, and whether everything is there."""
