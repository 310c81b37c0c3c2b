"""New qcow2 images, written once from their first byte to their last. Changing one that is there is `writing`."""
