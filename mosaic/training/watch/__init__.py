"""What is watched while a run trains: numbers, speed, losses that are not finite."""
