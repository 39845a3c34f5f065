"""Every private name of torch that we use: `compiler` has those that load Dynamo, `tensors` the others."""
