"""Writing qcow2 images. `order` says what must be on disk before what; reading is the rooms' above."""
