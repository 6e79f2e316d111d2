import sys

from trinix.kernels import _native

if sys.argv[1:2] == ["--check"]:
    _native.check(sys.argv[2])
else:
    print(_native.build())
