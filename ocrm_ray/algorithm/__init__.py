"""The algorithm as pure functions: tensors in, tensors out; standard library and torch only."""
