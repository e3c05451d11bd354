"""How much work a model is: what a launch estimates minutes and cost from."""


def gflop(config) -> float:
    """Billions of operations (GFLOP) of one forward pass of one clip; training takes three.

    config: a transformers VideoMAEConfig. A multiply-add counts as two operations. Counted are the
    matrices and the attention of the blocks, which are nearly all of the work; the patch embedding
    and the head are left out.
    """
    width, mlp = config.hidden_size, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    tokens = config.num_frames // config.tubelet_size * patches
    matrices = tokens * (4 * width**2 + 2 * width * mlp)
    attention = 2 * tokens**2 * width
    return 2 * config.num_hidden_layers * (matrices + attention) / 1e9
