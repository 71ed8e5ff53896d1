/* Damage JPEG files and their indexes of regions at random, check and decode them:
 * fuzz COUNT FILE...
 *
 * Run with the sanitizers: they end the program at the first access out of bounds. It ends itself
 * where a part was decoded without complaint and yet to other pixels than those of the whole. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

enum { SIDE = 400 };

static uint64_t state = 1;

static unsigned below(unsigned limit) { /* xorshift64* (Vigna, 2016) */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (unsigned)((state * 0x2545F4914F6CDD1Dull) >> 33) % limit;
}

static uint8_t *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) exit(2);
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    uint8_t *bytes = malloc(*size);
    if (bytes == NULL || fread(bytes, 1, *size, file) != *size) exit(2);
    fclose(file);
    return bytes;
}

/* A copy of exactly its size, so that reading one byte more is noticed. */
static uint8_t *damaged(const uint8_t *bytes, size_t *size) {
    unsigned kind = below(4);
    if (kind == 0 && *size > 2) *size = 1 + below((unsigned)*size - 1);
    uint8_t *copy = malloc(*size);
    memcpy(copy, bytes, *size);
    unsigned changes = kind == 3 ? 0 : 1 + below(4);
    for (unsigned i = 0; i < changes; i++) {
        /* Headers are a small part of a file and the larger part of what can go wrong. */
        unsigned at = below(below(2) ? (unsigned)*size : *size < 700 ? (unsigned)*size : 700);
        copy[at] = below(2) ? (uint8_t)(copy[at] ^ 1u << below(8)) : (uint8_t)below(256);
    }
    return copy;
}

static Box some_box(int width, int height) {
    Box box;
    box.left = (int)below((unsigned)width);
    box.top = (int)below((unsigned)height);
    box.right = box.left + 1 + (int)below((unsigned)(width - box.left));
    box.bottom = box.top + 1 + (int)below((unsigned)(height - box.top));
    return box;
}

static void judge(const uint8_t *whole, int width, Box box, const uint8_t *part) {
    int across = box.right - box.left;
    for (int y = box.top; y < box.bottom; y++, part += 3 * across)
        if (memcmp(whole + 3 * (y * width + box.left), part, (size_t)(3 * across)) != 0) {
            fprintf(stderr, "a part differs from the whole\n");
            exit(3);
        }
}

static void try(Decoder *decoder, const uint8_t *bytes, size_t size, const uint8_t *index,
                size_t index_size, int trusted) {
    static uint8_t whole[SIDE * SIDE * 3], part[SIDE * SIDE * 3];
    char message[MESSAGE_LENGTH];
    int width, height;
    Status kind = decode_size(decoder, bytes, size, &width, &height, message);
    if (kind == CORRUPT || width > SIDE || height > SIDE) return;
    decode_check(decoder, bytes, size, message);
    if (kind != DONE) return;
    Box all = {0, 0, width, height};
    Job job = {.bytes = bytes, .size = size, .image_width = width, .image_height = height,
               .box = all, .width = width, .height = height, .window = all, .kernel = BICUBIC,
               .out = whole};
    Status complete = decode_job(decoder, &job, message);
    Box box = some_box(width, height);
    job.box = box;
    job.width = box.right - box.left;
    job.height = box.bottom - box.top;
    job.window = (Box){0, 0, job.width, job.height};
    job.out = part;
    if (decode_job(decoder, &job, message) == DONE && complete == DONE)
        judge(whole, width, box, part);
    job.index = index;
    job.index_size = index_size;
    if (decode_job(decoder, &job, message) == DONE && complete == DONE && trusted)
        judge(whole, width, box, part);
    job.width = 1 + (int)below(60);
    job.height = 1 + (int)below(60);
    job.window = some_box(job.width, job.height);
    job.flip = (int)below(2);
    job.reduce = (int)below(2);
    job.kernel = (Kernel)below(2);
    decode_job(decoder, &job, message);
}

int main(int count, char **arguments) {
    Decoder *decoder = decoder_create();
    int rounds = atoi(arguments[1]), indexed = 0;
    for (int round = 0; round < rounds; round++) {
        size_t size, file_size, index_size = 0, own_size = 0;
        uint8_t *file = read_file(arguments[2 + below((unsigned)(count - 2))], &file_size);
        uint8_t *index = NULL, *own = NULL;
        size = file_size;
        uint8_t *bytes = damaged(file, &size);
        /* With the index that the damaged file itself gives, and with a damaged one of another. */
        if (index_build(bytes, size, &own, &own_size) == DONE) {
            indexed++;
            try(decoder, bytes, size, own, own_size, 1);
            free(own);
        } else {
            try(decoder, bytes, size, NULL, 0, 1);
        }
        if (index_build(file, file_size, &index, &index_size) == DONE) {
            uint8_t *wrong = damaged(index, &index_size);
            try(decoder, bytes, size, wrong, index_size, 0);
            free(wrong);
            free(index);
        }
        free(bytes);
        free(file);
    }
    decoder_destroy(decoder);
    printf("%d of %d could still be indexed\n", indexed, rounds);
    return 0;
}
