/* Decoding a part of a JPEG without the rest of it.
 *
 * A baseline JPEG is one string of bits: where an MCU (a square of 8 or 16 pixels) begins, and
 * the values its differences refer to, is known only after all bits before it. An index keeps both
 * for every few MCUs. With it the bits of the MCUs around a region are copied, unread, into a small
 * JPEG file of their own, which any decoder decodes to the very pixels of the whole one. Where the
 * copied rows do not follow one another, an MCU of nothing but the difference is put between them.
 *
 * The index, little-endian: u16 MCUs between entries, u16 MCUs a row, u16 rows, u16 components,
 * u32 bits in all; then entries row by row, each a u32 position (bits from the start of the file's
 * entropy-coded data) and an i16 predictor for each component. */

#include <stdlib.h>
#include <string.h>

#include "scan.h"

enum { HEADER = 12, BLOCKS = 6 /* of the largest MCU */ };

/* Zeros behind the end: libjpeg reads its fast way only as long as so many bytes are to come. */
enum { PADDING = 1024 };

static void put16(uint8_t *out, int value) {
    out[0] = (uint8_t)value;
    out[1] = (uint8_t)(value >> 8);
}

static int get16(const uint8_t *in) { return in[0] | in[1] << 8; }

static uint32_t get32(const uint8_t *in) {
    return (uint32_t)get16(in) | (uint32_t)get16(in + 2) << 16;
}

static void put32(uint8_t *out, uint64_t value) {
    put16(out, (int)(value & 0xFFFF));
    put16(out + 2, (int)(value >> 16 & 0xFFFF));
}

static size_t entry_size(int components) { return 4 + 2 * (size_t)components; }

static size_t entries_a_row(int per_row, int step) {
    return (size_t)((per_row + step - 1) / step);
}

Status index_build(const uint8_t *bytes, size_t size, uint8_t **index, size_t *index_size) {
    File *file = malloc(sizeof *file);
    if (file == NULL) return NO_MEMORY;
    *index = NULL;
    Status status = size < (1u << 28) ? file_parse(file, bytes, size) : UNSUPPORTED;
    if (status != DONE) goto end;
    int step = file->per_row / 16 > 2 ? file->per_row / 16 : 2;
    size_t entry = entry_size(file->components);
    *index_size = HEADER + entries_a_row(file->per_row, step) * (size_t)file->rows * entry;
    uint8_t *out = *index = malloc(*index_size);
    if (out == NULL) {
        status = NO_MEMORY;
        goto end;
    }
    put16(out, step);
    put16(out + 2, file->per_row);
    put16(out + 4, file->rows);
    put16(out + 6, file->components);
    out += HEADER;
    Reader reader = {.bytes = bytes, .at = file->scan, .size = size};
    int predictors[COMPONENTS] = {0};
    for (int row = 0; row < file->rows; row++)
        for (int mcu = 0; mcu < file->per_row; mcu++) {
            if (mcu % step == 0) {
                put32(out, position(&reader, file->scan));
                for (int i = 0; i < file->components; i++) put16(out + 4 + 2 * i, predictors[i]);
                out += entry;
            }
            status = read_mcu(&reader, file, predictors);
            if (status == DONE && reader.spent > reader.count) status = CORRUPT;
            if (status != DONE) goto end;
        }
    put32(*index + 8, position(&reader, file->scan));
    /* Where more than the end marker follows, decoders may read on. */
    refill(&reader);
    if (reader.at + 2 > size || bytes[reader.at] != 0xFF || bytes[reader.at + 1] != 0xD9)
        status = UNSUPPORTED;
end:
    if (status != DONE) {
        free(*index);
        *index = NULL;
    }
    free(file);
    return status;
}

/* Entropy-coded data under construction: whole bytes, with zeros stuffed after 0xFF. */
typedef struct {
    uint8_t *out;
    uint64_t bits; /* right-aligned */
    int count;
} Writer;

static void put_byte(Writer *writer, uint8_t byte) {
    *writer->out++ = byte;
    if (byte == 0xFF) *writer->out++ = 0;
}

static void put_bits(Writer *writer, uint32_t bits, int count) {
    writer->bits = writer->bits << count | (bits & ((1ull << count) - 1));
    writer->count += count;
    for (; writer->count >= 8; writer->count -= 8)
        put_byte(writer, (uint8_t)(writer->bits >> (writer->count - 8)));
}

static int has_ff(uint64_t word) {
    word = ~word;
    return ((word - 0x0101010101010101ull) & ~word & 0x8080808080808080ull) != 0;
}

static uint64_t swapped(uint64_t word) { return __builtin_bswap64(word); }

/* Copy the bits of the file's data from one position to another. */
static void copy_bits(Writer *writer, const uint8_t *data, uint64_t from, uint64_t to) {
    const uint8_t *at = data + from / 8, *end = data + to / 8;
    int skip = (int)(from % 8), rest = (int)(to % 8);
    if (at == end) {
        put_bits(writer, (uint32_t)(*at >> (8 - rest)), rest - skip);
        return;
    }
    put_bits(writer, *at, 8 - skip);
    at += *at == 0xFF ? 2 : 1;
    while (at < end) {
        uint64_t word;
        if (end - at >= 8 && (memcpy(&word, at, 8), !has_ff(word))) {
            word = swapped(word);
            uint64_t whole = writer->count ? writer->bits << (64 - writer->count) |
                                                 word >> writer->count
                                           : word;
            uint64_t stored = swapped(whole);
            if (!has_ff(whole)) {
                memcpy(writer->out, &stored, 8);
                writer->out += 8;
            } else {
                for (int shift = 56; shift >= 0; shift -= 8)
                    put_byte(writer, (uint8_t)(whole >> shift));
            }
            writer->bits = word; /* its low `count` bits are still to be written */
            at += 8;
            continue;
        }
        put_bits(writer, *at, 8);
        at += *at == 0xFF ? 2 : 1;
    }
    if (rest) put_bits(writer, (uint32_t)(*end >> (8 - rest)), rest);
}

static Status put_symbol(Writer *writer, const Huffman *table, int value) {
    if (!table->length[value]) return UNSUPPORTED;
    put_bits(writer, table->code[value], table->length[value]);
    return DONE;
}

static Status put_flat_block(Writer *writer, const Huffman *dc, const Huffman *ac, int difference) {
    int size = difference < 0 ? -difference : difference, category = 0;
    while (size >> category) category++;
    if (category >= CATEGORIES) return UNSUPPORTED;
    Status status = put_symbol(writer, dc, category);
    if (status != DONE) return status;
    if (difference < 0) difference--; /* of which the low bits are written */
    put_bits(writer, (uint32_t)difference, category);
    return put_symbol(writer, ac, 0);
}

/* An MCU of flat blocks, after which the predictors are `to` instead of `from`. */
static Status put_bridge(Writer *writer, const File *file, const int *from, const int *to) {
    for (int i = 0; i < file->components; i++) {
        const Component *component = &file->component[i];
        for (int block = 0; block < component->across * component->down; block++) {
            Status status = put_flat_block(writer, &file->dc[component->dc],
                                           &file->ac[component->ac],
                                           block == 0 ? to[i] - from[i] : 0);
            if (status != DONE) return status;
        }
    }
    return DONE;
}

typedef struct {
    const uint8_t *entries;
    int step, per_row, components;
    uint64_t bits; /* of all entropy-coded data */
} Index;

typedef struct {
    uint64_t bits;
    int predictors[COMPONENTS];
} Entry;

/* What precedes an MCU whose column is a multiple of the step. */
static void entry_read(const Index *index, int row, int mcu, Entry *entry) {
    size_t number = (size_t)row * entries_a_row(index->per_row, index->step);
    number += (size_t)(mcu / index->step);
    const uint8_t *bytes = index->entries + number * entry_size(index->components);
    entry->bits = get32(bytes);
    for (int i = 0; i < index->components; i++)
        entry->predictors[i] = (int16_t)get16(bytes + 4 + 2 * i);
}

/* What precedes the MCU after a row's last one or an entry: where a piece of a row ends. */
static void end_read(const Index *index, const File *file, int row, int mcu, Entry *entry) {
    memset(entry, 0, sizeof *entry);
    if (mcu < index->per_row)
        entry_read(index, row, mcu, entry);
    else if (row + 1 < file->rows)
        entry_read(index, row + 1, 0, entry);
    else
        entry->bits = index->bits; /* nothing is to follow, so its predictors do not matter */
}

static Status index_open(const Job *job, const File *file, Index *index) {
    const uint8_t *bytes = job->index;
    if (job->index_size < HEADER) return CORRUPT;
    *index = (Index){bytes + HEADER, get16(bytes), get16(bytes + 2), get16(bytes + 6),
                     get32(bytes + 8)};
    int rows = get16(bytes + 4);
    if (index->step < 1 || index->per_row != file->per_row || rows != file->rows ||
        index->components != file->components)
        return CORRUPT;
    size_t entries = entries_a_row(index->per_row, index->step) * (size_t)rows;
    if (job->index_size != HEADER + entries * entry_size(index->components)) return CORRUPT;
    return index->bits / 8 < job->size - file->scan ? DONE : CORRUPT;
}

static void put_table(const Huffman *table, int kind, uint8_t **out) {
    if (!table->total) return;
    int length = 2 + 17 + table->total;
    uint8_t start[] = {0xFF, 0xC4, (uint8_t)(length >> 8), (uint8_t)length, (uint8_t)kind};
    memcpy(*out, start, sizeof start);
    memcpy(*out + 5, table->counts + 1, 16);
    memcpy(*out + 21, table->values, (size_t)table->total);
    *out += 2 + length;
}

/* The header of the file with another size and complete tables; comments and profiles left out. */
static void put_header(const File *file, int width, int height, uint8_t **out) {
    const uint8_t *bytes = file->bytes;
    *(*out)++ = 0xFF;
    *(*out)++ = 0xD8;
    for (int i = 0; i < TABLES; i++) {
        put_table(&file->dc[i], i, out);
        put_table(&file->ac[i], 0x10 | i, out);
    }
    for (size_t at = 2; at < file->scan;) {
        size_t length = 2 + two(bytes + at + 2);
        int marker = bytes[at + 1];
        /* JFIF's and Adobe's markers say what the components mean. */
        if (marker != 0xC4 && (marker <= 0xE0 || marker == 0xEE)) {
            memcpy(*out, bytes + at, length);
            if (at + 4 == file->frame) {
                uint8_t *size = *out + 5;
                size[0] = (uint8_t)(height >> 8);
                size[1] = (uint8_t)height;
                size[2] = (uint8_t)(width >> 8);
                size[3] = (uint8_t)width;
            }
            *out += length;
        }
        at += length;
    }
}

static Status region_reserve(Region *region, size_t capacity) {
    if (region->capacity >= capacity) return DONE;
    free(region->bytes);
    region->bytes = malloc(capacity);
    region->capacity = region->bytes == NULL ? 0 : capacity;
    return region->bytes == NULL ? NO_MEMORY : DONE;
}

/* The rectangle of MCUs that are copied: [left, right) x [top, bottom). */
static Box mcus_around(const File *file, const Index *index, Box needed) {
    Box box = {needed.left - MARGIN, needed.top - MARGIN, needed.right + MARGIN,
               needed.bottom + MARGIN};
    int wide = file->mcu_width, high = file->mcu_height, step = index->step;
    box.left = box.left < 0 ? 0 : box.left / wide / step * step;
    box.top = box.top < 0 ? 0 : box.top / high;
    box.right = ((box.right + wide - 1) / wide + step - 1) / step * step;
    box.bottom = (box.bottom + high - 1) / high;
    if (box.right > file->per_row) box.right = file->per_row;
    if (box.bottom > file->rows) box.bottom = file->rows;
    return box;
}

static Status put_rows(Writer *writer, const File *file, const Index *index, Box mcus, int before,
                       int after) {
    Entry last = {0}, first, end;
    uint64_t copied = 0; /* up to where: what was copied is not copied again, so it has room */
    for (int row = mcus.top; row < mcus.bottom; row++) {
        entry_read(index, row, mcus.left, &first);
        end_read(index, file, row, mcus.right, &end);
        if (first.bits < copied || first.bits >= end.bits || end.bits > index->bits)
            return CORRUPT;
        copied = end.bits;
        Status status = DONE;
        if (before) status = put_bridge(writer, file, last.predictors, first.predictors);
        if (status != DONE) return status;
        copy_bits(writer, file->bytes + file->scan, first.bits, end.bits);
        last = end;
        if (after && row + 1 < mcus.bottom) {
            entry_read(index, row + 1, mcus.left, &last);
            status = put_bridge(writer, file, end.predictors, last.predictors);
        } else if (after) {
            status = put_bridge(writer, file, end.predictors, end.predictors);
        }
        if (status != DONE) return status;
    }
    return DONE;
}

/* A row of `count` flat MCUs that ends with the predictors of the first one copied. */
static Status put_first_row(Writer *writer, const File *file, const Index *index, Box mcus,
                            int count) {
    int none[COMPONENTS] = {0};
    Entry first;
    entry_read(index, mcus.top, mcus.left, &first);
    Status status = DONE;
    for (int i = 0; i < count && status == DONE; i++)
        status = put_bridge(writer, file, none, i + 1 < count ? none : first.predictors);
    return status;
}

Status region_extract(const Job *job, Box needed, Region *region) {
    static _Thread_local File file;
    Index index;
    Status status = file_parse(&file, job->bytes, job->size);
    if (status == DONE) status = index_open(job, &file, &index);
    if (status != DONE) return status;
    if (file.width != job->image_width || file.height != job->image_height) return CORRUPT;
    for (int i = 0; i < TABLES && status == DONE; i++) status = huffman_complete(&file.dc[i]);
    if (status != DONE) return status;
    Box mcus = mcus_around(&file, &index, needed);
    /* At the left edge no bridge may come before: its pixels would mix with the edge's. */
    int at_left = mcus.left == 0, at_right = mcus.right == file.per_row;
    int before = !at_left, after = at_left && !at_right;
    int above = at_left && mcus.top > 0;
    int across = mcus.right - mcus.left, down = mcus.bottom - mcus.top;
    int per_row = across + before + after;
    region->width = at_right ? file.width - mcus.left * file.mcu_width : across * file.mcu_width;
    region->width += (before + after) * file.mcu_width;
    region->height = mcus.bottom == file.rows ? file.height - mcus.top * file.mcu_height
                                              : down * file.mcu_height;
    region->height += above * file.mcu_height;
    region->left = needed.left + (before - mcus.left) * file.mcu_width;
    region->top = needed.top + (above - mcus.top) * file.mcu_height;
    /* Bridges take at most 27 + 16 bits a block, stuffing at most doubles everything, tables get
     * at most 12 symbols more, and a row that ends within a stuffed byte takes it whole. */
    size_t bridges = (size_t)(down * (before + after) + above * per_row);
    size_t rest = bridges * BLOCKS * 12 + (size_t)down * 2 + 8 * TABLES * 36;
    status = region_reserve(region, 2 * job->size + rest + PADDING);
    if (status != DONE) return status;
    Writer writer = {.out = region->bytes};
    put_header(&file, region->width, region->height, &writer.out);
    if (above) status = put_first_row(&writer, &file, &index, mcus, per_row);
    if (status == DONE) status = put_rows(&writer, &file, &index, mcus, before, after);
    if (status != DONE) return status;
    if (writer.count) put_bits(&writer, 0x7F, 8 - writer.count);
    *writer.out++ = 0xFF;
    *writer.out++ = 0xD9;
    memset(writer.out, 0, PADDING);
    writer.out += PADDING;
    region->size = (size_t)(writer.out - region->bytes);
    return DONE;
}
