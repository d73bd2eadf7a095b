"""Pure tensor functions: no layers, no variables; they compile for XLA and TPUs."""
