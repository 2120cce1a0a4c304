// Turns pairs of values of each head by the angles of its token's position, a thread for each pair.

KERNEL(rope)(
    float *x, const float *cosines, const float *sines, const u32 *positions, i64 tokens, int heads, int head_dim, int first, int half,
    int interleaved) {
    i64 count = tokens * heads * half;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int pair = (int)(i % half);
        i64 head = i / half, token = head / heads;
        float *part = x + head * head_dim + first;
        float *a = part + (interleaved ? 2 * pair : pair), *b = part + (interleaved ? 2 * pair + 1 : half + pair);
        i64 angle = (i64)positions[token] * half + pair;
        float c = cosines[angle], s = sines[angle], p = *a, q = *b;
        *a = p * c - q * s;
        *b = q * c + p * s;
    }
}
EXPORT(rope)
