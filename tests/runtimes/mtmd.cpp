// What llama.cpp makes of a picture: mtmd MODEL MMPROJ SIDE OUT writes the features of one of SIDE · SIDE pixels, as float32.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "llama.h"
#include "mtmd.h"

int main(int, char ** arguments) {
    const int side = atoi(arguments[3]);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(arguments[1], llama_model_default_params());
    mtmd_context_params params = mtmd_context_params_default();
    params.use_gpu = false;
    params.warmup = false;
    params.n_threads = 2;
    mtmd_context * context = model ? mtmd_init_from_file(arguments[2], model, params) : nullptr;
    if (!context) {
        return 2;
    }
    // The same picture stands in features.py.
    std::vector<unsigned char> pixels(3 * side * side);
    for (int y = 0; y < side; y++) {
        for (int x = 0; x < side; x++) {
            for (int colour = 0; colour < 3; colour++) {
                pixels[(y * side + x) * 3 + colour] = (y * 7 + x * 3 + colour * 50 + (y * x) % 31) % 256;
            }
        }
    }
    const mtmd_bitmap * pictures[] = {mtmd_bitmap_init(side, side, pixels.data())};
    const char * marker = mtmd_default_marker();
    mtmd_input_text text{marker, strlen(marker), false, true};
    mtmd_input_chunks * chunks = mtmd_input_chunks_init();
    if (mtmd_tokenize(context, chunks, &text, pictures, 1)) {
        return 3;
    }
    FILE * out = fopen(arguments[4], "wb");
    for (size_t i = 0; i < mtmd_input_chunks_size(chunks); i++) {
        const mtmd_input_chunk * chunk = mtmd_input_chunks_get(chunks, i);
        if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_IMAGE) {
            if (mtmd_encode_chunk(context, chunk)) {
                return 4;
            }
            fwrite(mtmd_get_output_embd(context), sizeof(float), mtmd_input_chunk_get_n_tokens(chunk) * llama_model_n_embd_inp(model), out);
        }
    }
    return fclose(out);
}
