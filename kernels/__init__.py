"""Every hot loop of backprop_gpu, by the machine that it runs on; README.md in this folder is the map."""
