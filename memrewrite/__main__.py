"""python -m memrewrite"""

from memrewrite.cli import main

raise SystemExit(main())
