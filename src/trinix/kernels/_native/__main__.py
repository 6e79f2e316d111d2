import sys

from trinix.kernels import _native

if sys.argv[1:2] == ["--check"]:
    _native.check(sys.argv[2])
else:
    try:
        print(_native.build())
    except RuntimeError as error:
        sys.exit(str(error))
