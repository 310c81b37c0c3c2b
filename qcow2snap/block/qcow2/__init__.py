"""The qcow2 driver. `driver.Qcow2Node` is the node; the other modules are its parts, each with one purpose."""
