"""Hidden states of the frozen model with the scalars that training needs."""
