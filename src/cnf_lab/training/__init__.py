"""Building, running and tracking: the parts that know Hydra, Lightning and wandb."""
