/* What the parts of the decoder share. All pixels are 8 bits; rows of four bytes a pixel (RGBX)
 * inside, three (RGB) at the end. */

#ifndef FOVEATE_NATIVE_H
#define FOVEATE_NATIVE_H

#include <stddef.h>
#include <stdint.h>

enum {
    MESSAGE_LENGTH = 200,
    PIXEL = 4,  /* bytes */
    MARGIN = 2, /* pixels that colour's interpolation reaches beyond a region */
};

typedef enum {
    DONE,
    UNSUPPORTED, /* a valid kind of file, or a use, that is left to another decoder */
    CORRUPT,     /* not a whole JPEG file, or not of the size that was said */
    NO_MEMORY,
} Status;

typedef struct {
    int left, top, right, bottom;
} Box;

typedef enum { BILINEAR, BICUBIC } Kernel;

/* One image and what becomes of it: cut out `box`, resize that to width x height, cut `window`
 * from the result, mirror it if so asked, and write RGB to `out`. */
typedef struct {
    const uint8_t *bytes; /* a JPEG file, or its pixels (RGB) */
    size_t size;
    int decoded; /* whether they are pixels */
    const uint8_t *index; /* its index of regions (region.c), or NULL */
    size_t index_size;
    int image_width, image_height;
    Box box;
    int width, height;
    Box window;
    Kernel kernel;
    int flip;
    int reduce; /* decode at 1/2, 1/4 or 1/8 where the result is smaller still: loses detail */
    uint8_t *out;
} Job;

/* resample.c: one axis of a resize, as weights of 14 bits. Output i of `size` is the sum over t
 * < taps of weights[i * taps + t] times input first[i] + t; `taps` is even, the inputs beyond
 * `end` have weight 0. */
typedef struct {
    int size, taps, begin, end;
    int *first;
    int16_t *weights;
} Axis;

Status axis_create(Axis *axis, double start, double extent, int outputs, int from, int to,
                   Kernel kernel);
void axis_destroy(Axis *axis);
/* Resize `rows` rows of RGBX pixels, which begin with input axis->begin, to RGB rows of axis->size
 * pixels, `stride` bytes apart. Behind the inputs axis->taps + 2 more pixels must be readable. */
void resample_rows(const Axis *axis, const uint8_t *const *inputs, int rows, uint8_t *out,
                   size_t stride, int flip);
/* The same for columns: `input` has axis->end - axis->begin rows of `length` bytes. */
void resample_columns(const Axis *axis, const uint8_t *input, size_t length, uint8_t *out);

/* region.c: where in a JPEG's data its minimal coded units (MCUs) begin, so that a part of the
 * image can be decoded by itself. */
Status index_build(const uint8_t *bytes, size_t size, uint8_t **index, size_t *index_size);
/* A JPEG file of the MCUs around `needed`; *moved is where needed.left, needed.top are in it. */
typedef struct {
    uint8_t *bytes;
    size_t size, capacity;
    int width, height, left, top;
} Region;
Status region_extract(const Job *job, Box needed, Region *region);

/* decode.c */
typedef struct Decoder Decoder;
Decoder *decoder_create(void);
void decoder_destroy(Decoder *decoder);
Status decode_job(Decoder *decoder, const Job *job, char message[MESSAGE_LENGTH]);
Status decode_size(Decoder *decoder, const uint8_t *bytes, size_t size, int *width, int *height,
                   char message[MESSAGE_LENGTH]);
/* Read a whole file of any kind that libjpeg knows: CORRUPT, and why, where its end marker or a
 * part of its image is missing or cannot be read. */
Status decode_check(Decoder *decoder, const uint8_t *bytes, size_t size,
                    char message[MESSAGE_LENGTH]);

#endif
