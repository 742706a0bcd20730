"""What the subcommands do that are not training."""
