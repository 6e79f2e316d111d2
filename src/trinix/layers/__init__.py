"""nn.Module forms of the ops: parameters and shapes, one call into ``trinix.ops`` each."""
