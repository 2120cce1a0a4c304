// The pointwise functions of feed-forward layers, for whatever kernel applies one.

// 1 / σ(x).
__device__ __forceinline__ float sigmoid_of(float x) { return 1.0f + exp_as_cpu(-x); }

// The polynomial of the CPU backend, to the bit.
__device__ __forceinline__ float gelu_of(float x) {
    float square = x * x;
    float s = square > 36.0f ? 36.0f : square;
    float q = 4.251024e-13f;
    q = q * s - 4.0990666e-11f;
    q = q * s + 1.5295316e-9f;
    q = q * s - 2.505618e-8f;
    q = q * s + 2.4990566e-8f;
    q = q * s + 6.3147736e-6f;
    q = q * s - 1.0581198e-4f;
    q = q * s - 7.217251e-5f;
    q = q * s + 7.267031e-2f;
    q = q * s + 1.5957693f;
    return x / sigmoid_of(x * q);
}

// The numbers that some functions have: of SwigluOai alpha, limit and shift, of SiluWithin the limit, of xIELU the factors above and below 0, the slope at 0 and the
// largest exponent.
struct Numbers {
    float a, b, c, d;
};

__device__ __forceinline__ float activation_of(int kind, float x, Numbers of) {
    switch (kind) {
        case 0: return x / sigmoid_of(x);
        case 1: return gelu_of(x);
        case 2: return x / sigmoid_of(1.595769f * (x + 0.044715f * x * x * x));
        case 3: return x < 0.0f ? 0.0f : x;
        case 4: {
            float positive = x < 0.0f ? 0.0f : x;
            return positive * positive;
        }
        case 5: {
            float gate = x > of.b ? of.b : x;
            return gate / sigmoid_of(of.a * gate);
        }
        case 6: {
            float exponent = x < of.d ? x : of.d;
            float curve = x > 0.0f ? of.a * x * x : of.b * (exp_as_cpu(exponent) - 1.0f - x);
            return curve + of.c * x;
        }
        case 8: return x;
        case 9: {
            float gate = x / sigmoid_of(x);
            return gate > of.b ? of.b : gate;
        }
        default: return 1.0f / sigmoid_of(x);
    }
}
