"""What every tier promises, and what each promises beyond."""
