from trinix.cli import main

raise SystemExit(main())
