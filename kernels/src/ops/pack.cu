// Codes as files hold them, one code a byte until then.

// Streams of codes of `bits` bits, each stream `length` codes long and packed into `words` whole words of 32 bits. Code `k` of stream `s`
// lies at `s * stream_step + k * code_step`, word `w` at `s * stream_words + w * word_step`. `streams_first` says whether neighbouring
// threads have neighbouring streams, or what follows in one.
//
// With `awq`, eight codes of a word lie in AWQ's order. `less` is subtracted from each code as it is packed.
KERNEL(pack_words)(
    u32 *out, const u8 *codes, i64 streams, i64 length, i64 words, i64 stream_step, i64 code_step, i64 stream_words, i64 word_step,
    int bits, int less, int awq, int streams_first) {
    i64 count = streams * words;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        i64 stream = streams_first ? i % streams : i / words, word = streams_first ? i / streams : i % words;
        const u8 *from = codes + stream * stream_step;
        // Nibble j of a word is code 0 2 4 6 1 3 5 7.
        i64 start = 32 * word;
        u32 packed = 0;
        if (awq) {
            for (int j = 0; j < 8; j++) packed |= (u32)((from[(8 * word + j % 4 * 2 + j / 4) * code_step] - less) & 15) << (4 * j);
        } else {
            // A code may begin in the word before and end in the one after.
            for (i64 k = start / bits; k < length && k * bits < start + 32; k++) {
                u32 code = (u32)(from[k * code_step] - less) & ((1u << bits) - 1);
                int shift = (int)(k * bits - start);
                packed |= shift < 0 ? code >> -shift : code << shift;
            }
        }
        out[stream * stream_words + word * word_step] = packed;
    }
}
EXPORT(pack_words)

// The other way round: a thread for each code.
KERNEL(unpack_words)(
    u8 *codes, const u32 *packed, i64 streams, i64 length, i64 words, i64 stream_step, i64 code_step, i64 stream_words, i64 word_step,
    int bits, int less, int awq, int streams_first) {
    i64 count = streams * length;
    u32 mask = (1u << bits) - 1;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        i64 stream = streams_first ? i % streams : i / length, k = streams_first ? i / streams : i % length;
        const u32 *from = packed + stream * stream_words;
        u32 code;
        if (awq) {
            // Codes 0 2 4 6 1 3 5 7 are nibbles 0 to 7.
            int j = (int)(k % 2 * 4 + k % 8 / 2);
            code = from[k / 8 * word_step] >> (4 * j);
        } else {
            i64 word = k * bits / 32;
            int shift = (int)(k * bits % 32);
            code = from[word * word_step] >> shift;
            // It may end in the next word.
            if (shift + bits > 32) code |= from[(word + 1) * word_step] << (32 - shift);
        }
        codes[stream * stream_step + k * code_step] = (u8)((code + (u32)less) & mask);
    }
}
EXPORT(unpack_words)

// ggml's block types, by their numbers in files.
#define Q4_0 2
#define Q4_1 3
#define Q5_0 6
#define Q5_1 7
#define Q8_0 8
#define Q2_K 10
#define Q3_K 11
#define Q4_K 12
#define Q5_K 13
#define Q6_K 14
#define IQ4_NL 20
#define IQ4_XS 23
#define TQ1_0 34
#define TQ2_0 35
#define MXFP4 39

__device__ __forceinline__ u8 half_byte(float x, int byte) { return (u8)(to_f16(x) >> (8 * byte)); }

// Two nibbles: a code and the one `apart` after it.
__device__ __forceinline__ u8 nibbles(const u8 *codes, int apart) { return (u8)((codes[0] & 15) | codes[apart] << 4); }

// Byte `at` of 128: 32 low nibbles, then the high ones of the same bytes.
__device__ __forceinline__ u8 halves(const u8 *codes, int at) { return nibbles(codes + at / 32 * 64 + at % 32, 32); }

// `width` bits of each of `count` codes that lie 32 apart, from bit `low` on.
__device__ __forceinline__ u8 gathered(const u8 *codes, int count, int low, int width) {
    int byte = 0;
    for (int j = 0; j < count; j++) byte |= (codes[32 * j] >> low & ((1 << width) - 1)) << (width * j);
    return (u8)byte;
}

// Byte `at` of 64, each of four codes' two low bits.
__device__ __forceinline__ u8 pairs(const u8 *codes, int at) { return gathered(codes + at / 32 * 128 + at % 32, 4, 0, 2); }

// Byte `at` of the four that hold the fifth bits of 32 codes.
__device__ __forceinline__ u8 fifths(const u8 *codes, int at) {
    int byte = 0;
    for (int j = 0; j < 8; j++) byte |= (codes[8 * at + j] >> 4 & 1) << j;
    return (u8)byte;
}

// Byte `at` of the twelve that hold eight scales and eight mins of six bits.
__device__ __forceinline__ u8 sixes(const u8 *scales, const u8 *mins, int at) {
    if (at >= 8) return (u8)((scales[at - 4] & 15) | mins[at - 4] << 4);
    const u8 *of = (at < 4 ? scales : mins) + at % 4;
    return (u8)((of[0] & 63) | of[4] >> 4 << 6);
}

// The ternary codes whose base-3 number byte `at` holds.
__device__ __forceinline__ u8 ternary(const u8 *codes, int at) {
    int apart = at < 32 ? 32 : at < 48 ? 16 : 4;
    codes += at < 32 ? at : at < 48 ? 160 + at - 32 : 240 + at - 48;
    int count = at < 48 ? 5 : 4, power = 81, sum = 0;
    for (int j = 0; j < count; j++, power /= 3) sum += codes[apart * j] * power;
    return (u8)(((sum & 255) * 256 + 242) / 243);
}

// The power of two below a positive scale.
__device__ __forceinline__ u8 exponent(float d) {
    if (!(d > 0.0f)) return 0;
    u32 bits = __float_as_uint(d), e = bits >> 23;
    if (e == 0) return bits >= 0x00400000u;
    return (u8)(e + 1 < 255 ? e + 1 : 255);
}

// Byte `at` of a block. `subs` holds 16 scales and 16 mins, for the types whose groups have them.
__device__ __forceinline__ u8 byte_of(int type, int at, float d, float m, const u8 *subs, const u8 *codes) {
    const u8 *mins = subs + 16;
    switch (type) {
        case Q4_0:
        case IQ4_NL: return at < 2 ? half_byte(d, at) : nibbles(codes + at - 2, 16);
        case Q4_1: return at < 2 ? half_byte(d, at) : at < 4 ? half_byte(-m, at - 2) : nibbles(codes + at - 4, 16);
        case Q5_0: return at < 2 ? half_byte(d, at) : at < 6 ? fifths(codes, at - 2) : nibbles(codes + at - 6, 16);
        case Q5_1:
            if (at < 4) return at < 2 ? half_byte(d, at) : half_byte(-m, at - 2);
            return at < 8 ? fifths(codes, at - 4) : nibbles(codes + at - 8, 16);
        case Q8_0: return at < 2 ? half_byte(d, at) : codes[at - 2] ^ 0x80;
        case Q2_K:
            if (at < 16) return (u8)((subs[at] & 15) | mins[at] << 4);
            if (at < 80) return pairs(codes, at - 16);
            return at < 82 ? half_byte(d, at - 80) : half_byte(m, at - 82);
        case Q3_K:
            if (at < 32) return gathered(codes + at, 8, 2, 1);
            if (at < 96) return pairs(codes, at - 32);
            if (at < 104) return (u8)((subs[at - 96] + 32 & 15) | (subs[at - 88] + 32) << 4);
            if (at < 108) {
                int byte = 0;
                for (int j = 0; j < 4; j++) byte |= (subs[at - 104 + 4 * j] + 32 >> 4 & 3) << (2 * j);
                return (u8)byte;
            }
            return half_byte(d, at - 108);
        case Q4_K:
        case Q5_K:
            if (at < 4) return at < 2 ? half_byte(d, at) : half_byte(m, at - 2);
            if (at < 16) return sixes(subs, mins, at - 4);
            if (type == Q4_K) return halves(codes, at - 16);
            return at < 48 ? gathered(codes + at - 16, 8, 4, 1) : halves(codes, at - 48);
        case Q6_K:
            if (at < 128) return nibbles(codes + at / 64 * 128 + at % 64, 64);
            if (at < 192) return gathered(codes + (at - 128) / 32 * 128 + at % 32, 4, 4, 2);
            return at < 208 ? subs[at - 192] : half_byte(d, at - 208);
        case IQ4_XS:
            if (at < 2) return half_byte(d, at);
            if (at < 4) {
                int byte = 0;
                for (int j = 0; j < 4; j++) byte |= (subs[4 * (at - 2) + j] + 32 >> 4 & 3) << (2 * j);
                return (u8)byte;
            }
            if (at < 8) return (u8)((subs[2 * (at - 4)] + 32 & 15) | (subs[2 * (at - 4) + 1] + 32) << 4);
            return nibbles(codes + (at - 8) / 16 * 32 + (at - 8) % 16, 16);
        case TQ1_0: return at < 52 ? ternary(codes, at) : half_byte(d, at - 52);
        case TQ2_0: return at < 64 ? pairs(codes, at) : half_byte(d, at - 64);
        case MXFP4: return at < 1 ? exponent(d) : nibbles(codes + at - 1, 16);
        default: return 0;
    }
}

// A thread for each byte of the blocks; `heads` holds a block's scale and min, `subs` may be nothing.
KERNEL(pack_blocks)(
    u8 *out, const u8 *codes, const float *heads, const u8 *subs, int type, int block_len, int block_bytes, i64 count) {
    for (i64 i = global_index(); i < count; i += global_stride()) {
        i64 block = i / block_bytes;
        int at = (int)(i - block * block_bytes);
        out[i] = byte_of(type, at, heads[2 * block], heads[2 * block + 1], subs + 32 * block, codes + block * block_len);
    }
}
EXPORT(pack_blocks)
