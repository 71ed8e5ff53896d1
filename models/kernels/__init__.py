"""The operators the models call, each with one definition in one of the `eager` files.

Invariant: models import operators from here and nowhere else.
"""

from .eager import adaptive_pool as adaptive_pool
from .eager import aggregated_attention as aggregated_attention
from .eager import cosine_attention as cosine_attention
from .eager import pair_perceptron as pair_perceptron
from .eager import pooled_gelu as pooled_gelu
from .eager import relative_attention as relative_attention
from .eager_conv import conv_glu as conv_glu
from .eager_depthwise import depthwise_conv as depthwise_conv
from .eager_depthwise import dynamic_conv as dynamic_conv
from .eager_norm import batch_norm as batch_norm
from .eager_norm import gelu_norm_conv as gelu_norm_conv
from .eager_norm import gelu_norm_linear as gelu_norm_linear
from .eager_norm import group_norm as group_norm
