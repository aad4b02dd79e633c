"""A Megatron GPT model on the ranks of a layout, and the mathematics of a step.

In: a model's shape, a layout, packed micro-batches. Out: a model with its optimizer, the loss of
every trained token, sums by source. It runs in each trainer process, on a GPU or a CPU. It may
import `miles.train.config`, `types` and `parallel_layout`, `miles.data.types`, `miles.architecture`
and torch; Megatron only inside functions, since importing it takes seconds. `gpt`, which extends a
class of Megatron's, is itself imported inside functions.

    build             a rank's part of the GPT model; transformer_config and norm are pieces of it
    layer_spec        which modules a layer is made of
    kernels           SwiGLU and rotation, fused where such kernels are; swiglu, a module of it
    heads             query, key and value in one kernel, for self_attention; heads_kernels is Triton
    triton_kernels    whether those kernels in Triton that are ours run here
    attention         attention over packed sequences, put into the model's layers;
                      attention_backends has the kernels, long_segments one of them,
                      packed_params what a layer is told
    rotary            the angle of each token by its position, once a micro-batch
    experts           the experts of a layer in grouped_product, with weighted_swiglu in between;
                      expert_kernels has what is in Triton
    token_dispatch    tokens to the ranks of their experts and back, by permutation
    router_loads      the tokens of every expert in a step, and the loss that balances them
    device_batch      a micro-batch on the device, sent one ahead
    packed_forward    the forward pass over a packed micro-batch
    gpt               Megatron's GPTModel with the loss of output_loss
    output_loss       output layer and loss on trained tokens only, in pieces
    softmax           of a piece of logits; softmax_kernels has it in Triton
    loss              a sum over trained tokens, over their number
    data_parallel     sums of gradients and gathering of weights, beside the computation
    weight_gradients  added to their float32 sum by the matrix product itself
    optimizer         Megatron's distributed Adam, and the learning-rate schedule; gradient_norm, a
                      piece of it
    process_groups    joining the ranks of a layout, and leaving them
    megatron_on_cpu   what lets Megatron run where there is no CUDA
    adapters          small trained matrices beside the frozen weights (LoRA); adapter_dropout drops
                      some of their input
    device            the GPU or the CPU of this process
"""
