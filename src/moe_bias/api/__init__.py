"""What `moe_bias` offers to Python: each call does what the command of its name does, and to the same bytes."""
