"""What the store is worth: ceiling, curve and forecasts, against exact counts."""
