"""Refuse networks with learned weights outside of Conv and Linear layers that sum inputs: there are neurons in them.

Everything that torch computes in a forward pass is watched, whatever Python or C++ it comes from. What a tensor holds
is of one of four kinds (``tracking.py``): what depends on the image, what depends on parameters alone
(learned), what depends on tensors that the network stores beside them (buffers, attributes), and constants. An
operation on an image's values and learned ones is

- elementwise, and so no neuron by itself: layer scale, the affine part of a norm, position embeddings;
- something that moves values, such as a concatenation with class tokens;
- or anything else (a product of matrices, a convolution, a distance, an operation of another library): refused.

An elementwise product becomes a neuron once it is summed. So each value has a factor, a number that stands for the
learned values that it was multiplied by. A sum over values with different factors is refused where it is the only
reader of the product; where the product goes on, the sum is a statistic of it, as the mean in a norm that is written
out. Whether an operation sums over different factors, or chooses among them, is found by running it on them
(``trials.py``). A sum may also be one of tensors, in a loop: so products have an origin, which value of
which tensor they were made of.

Stored tensors may be prototypes, or a window, a cosine transform, a blur. Where values are summed with them and no
layer follows, the network's outputs are sums of that kind: refused. Otherwise they are fixed steps between layers.
"""
