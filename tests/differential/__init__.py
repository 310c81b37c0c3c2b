"""What qcow2snap says of an image against what QEMU says of it."""

import pytest

pytest.register_assert_rewrite("tests.differential.judge")
