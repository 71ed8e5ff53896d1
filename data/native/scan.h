/* What precedes the pixels in a baseline JPEG file: tables, frame, scan, and bits. */

#ifndef FOVEATE_SCAN_H
#define FOVEATE_SCAN_H

#include "native.h"

enum { COMPONENTS = 3, TABLES = 4, FAST = 9, CATEGORIES = 12 };

typedef struct {
    int total; /* symbols; 0: not defined */
    uint8_t counts[17], values[256]; /* how many codes of each length, and what they mean */
    int min_code[17], max_code[17], first_value[17]; /* by length; max_code -1 where none */
    uint16_t fast[1 << FAST];                        /* length << 8 | value; 0: a longer code */
    uint16_t code[256];
    uint8_t length[256];
} Huffman;

typedef struct {
    int id, across, down, dc, ac;
} Component;

typedef struct {
    const uint8_t *bytes;
    size_t size, scan; /* where the entropy-coded data begins */
    size_t frame;      /* where the frame header's payload begins */
    int width, height, components, mcu_width, mcu_height, per_row, rows;
    Component component[COMPONENTS];
    Huffman dc[TABLES], ac[TABLES];
} File;

/* Bits of entropy-coded data. After the data's end come zeros, and `spent` says how many. */
typedef struct {
    const uint8_t *bytes;
    size_t at, size;
    uint64_t bits; /* left-aligned */
    int count, spent;
} Reader;

/* Read everything up to the entropy-coded data. UNSUPPORTED are progressive and arithmetic files,
 * 12 bits, several scans, restart markers, sampling beyond 2 x 2. */
Status file_parse(File *file, const uint8_t *bytes, size_t size);
/* Move past an MCU and add its differences to the components' predictors. */
Status read_mcu(Reader *reader, const File *file, int *predictors);
/* How many bits of the file, stuffed bytes included, lie between `scan` and the next one read. */
uint64_t position(const Reader *reader, size_t scan);
/* Move bytes that are whole into the reader; where it then stands no more data follow. */
void refill(Reader *reader);
/* Give a code to every category of differences. */
Status huffman_complete(Huffman *table);

static inline unsigned two(const uint8_t *bytes) { return (unsigned)bytes[0] << 8 | bytes[1]; }

#endif
