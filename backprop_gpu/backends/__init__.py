"""One module per backend, the contract that they fulfil, and the selection among them.

Import from the modules: the name `backprop_gpu.backends` itself is the public function that lists them.
"""
