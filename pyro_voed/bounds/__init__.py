"""Terms of bounds as pure functions of tensors, one file a bound."""
