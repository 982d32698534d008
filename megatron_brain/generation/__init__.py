"""Drawing responses from a policy: key/value cache, token choice, sampler."""
