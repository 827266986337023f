"""Products with 4-bit weights on CUDA devices by Triton kernels, for formats with one or two codebooks of 16 values.

``table_layout`` describes a format, ``word_packing`` brings codes and scales into the order in which a thread needs
them, ``ptx_text`` writes the machine instructions that decode a word, and the files named ``*_kernel`` hold the
kernels. Importing this package needs neither torch nor Triton; the kernels need both (``pip install halfbyte[gpu]``).
"""
