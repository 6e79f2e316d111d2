from trinix.kernels import _native

print(_native.build())
