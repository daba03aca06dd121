"""The reference model. The rest of jaxtrain does not depend on it: any parameter pytree will do."""
