/* Reading baseline JPEG files up to their pixels (ITU-T T.81, annexes B, C and F). */

#include <string.h>

#include "scan.h"

/* Derive the codes from counts and values. */
static Status huffman_define(Huffman *table) {
    int code = 0, k = 0;
    memset(table->fast, 0, sizeof table->fast);
    for (int length = 1; length <= 16; length++, code <<= 1) {
        table->first_value[length] = k;
        table->min_code[length] = code;
        for (int i = 0; i < table->counts[length]; i++, k++, code++) {
            if (code >= 1 << length) return CORRUPT;
            int value = table->values[k];
            table->code[value] = (uint16_t)code;
            table->length[value] = (uint8_t)length;
            if (length > FAST) continue;
            int low = code << (FAST - length);
            for (int rest = 0; rest < 1 << (FAST - length); rest++)
                table->fast[low + rest] = (uint16_t)(length << 8 | value);
        }
        table->max_code[length] = table->counts[length] ? code - 1 : -1;
    }
    return DONE;
}

/* Tables made for one image lack the categories that it does not have. But no code is all ones:
 * behind that one there is room for longer ones. */
Status huffman_complete(Huffman *table) {
    int length = 16, before = table->total;
    while (length > 0 && !table->counts[length]) length--;
    for (int category = 0; before && category < CATEGORIES && length < 16; category++)
        if (!table->length[category] && table->total < 256) {
            table->counts[++length]++;
            table->values[table->total++] = (uint8_t)category;
        }
    return table->total == before ? DONE : huffman_define(table);
}

static Status read_tables(File *file, const uint8_t *payload, size_t length) {
    while (length > 0) {
        if (length < 17) return CORRUPT;
        int total = 0, number = payload[0] & 15;
        for (int i = 1; i <= 16; i++) total += payload[i];
        if (total > 256 || length < 17 + (size_t)total || number >= TABLES) return CORRUPT;
        Huffman *table = payload[0] >> 4 ? &file->ac[number] : &file->dc[number];
        memset(table, 0, sizeof *table);
        memcpy(table->counts + 1, payload + 1, 16);
        memcpy(table->values, payload + 17, (size_t)total);
        table->total = total;
        Status status = huffman_define(table);
        if (status != DONE) return status;
        payload += 17 + total;
        length -= 17 + (size_t)total;
    }
    return DONE;
}

static Status read_frame(File *file, const uint8_t *payload, size_t length) {
    if (length < 6 || file->components) return CORRUPT;
    file->height = (int)two(payload + 1);
    file->width = (int)two(payload + 3);
    file->components = payload[5];
    if (payload[0] != 8 || !file->height || !file->width) return UNSUPPORTED;
    if (file->components != 1 && file->components != 3) return UNSUPPORTED;
    if (length < 6 + 3 * (size_t)file->components) return CORRUPT;
    int across = 1, down = 1;
    for (int i = 0; i < file->components; i++) {
        const uint8_t *entry = payload + 6 + 3 * i;
        Component *component = &file->component[i];
        *component = (Component){entry[0], entry[1] >> 4, entry[1] & 15, 0, 0};
        /* Of a single component a scan knows no MCUs larger than a block. */
        if (file->components == 1) component->across = component->down = 1;
        if (component->across > across) across = component->across;
        if (component->down > down) down = component->down;
    }
    /* The usual ones: luminance at most 2 x 2, colour 1 x 1. */
    for (int i = 0; i < file->components; i++) {
        Component *component = &file->component[i];
        int most = i > 0 ? 1 : 2;
        if (component->across < 1 || component->across > most) return UNSUPPORTED;
        if (component->down < 1 || component->down > most) return UNSUPPORTED;
    }
    file->mcu_width = 8 * across;
    file->mcu_height = 8 * down;
    file->per_row = (file->width + file->mcu_width - 1) / file->mcu_width;
    file->rows = (file->height + file->mcu_height - 1) / file->mcu_height;
    return DONE;
}

static Status read_scan(File *file, const uint8_t *payload, size_t length) {
    if (!file->components || length < 4 || payload[0] != file->components) return UNSUPPORTED;
    if (length < 4 + 2 * (size_t)file->components) return CORRUPT;
    for (int i = 0; i < file->components; i++) {
        Component *component = &file->component[i];
        component->dc = payload[2 + 2 * i] >> 4;
        component->ac = payload[2 + 2 * i] & 15;
        if (payload[1 + 2 * i] != component->id) return UNSUPPORTED;
        if (component->dc >= TABLES || component->ac >= TABLES) return CORRUPT;
        if (!file->dc[component->dc].total || !file->ac[component->ac].total)
            return UNSUPPORTED;
    }
    return DONE;
}

Status file_parse(File *file, const uint8_t *bytes, size_t size) {
    memset(file, 0, sizeof *file);
    file->bytes = bytes;
    file->size = size;
    size_t at = 2;
    while (at + 4 <= size) {
        int marker = bytes[at + 1];
        size_t length = two(bytes + at + 2);
        const uint8_t *payload = bytes + at + 4;
        if (bytes[at] != 0xFF || length < 2 || at + 2 + length > size) return CORRUPT;
        Status status = DONE;
        if (marker == 0xC4) {
            status = read_tables(file, payload, length - 2);
        } else if (marker == 0xC0 || marker == 0xC1) {
            file->frame = at + 4;
            status = read_frame(file, payload, length - 2);
        } else if (marker == 0xDD) {
            status = length == 4 && two(payload) == 0 ? DONE : UNSUPPORTED;
        } else if (marker == 0xDA) {
            file->scan = at + 2 + length;
            return read_scan(file, payload, length - 2);
        } else if (marker < 0xDB || marker == 0xFF) {
            return UNSUPPORTED; /* other kinds of frames, or fill bytes */
        }
        if (status != DONE) return status;
        at += 2 + length;
    }
    return CORRUPT;
}

void refill(Reader *reader) {
    while (reader->count <= 56) {
        uint64_t byte = 0;
        if (reader->at < reader->size &&
            (reader->bytes[reader->at] != 0xFF ||
             (reader->at + 1 < reader->size && reader->bytes[reader->at + 1] == 0))) {
            byte = reader->bytes[reader->at];
            reader->at += byte == 0xFF ? 2 : 1;
        } else {
            reader->spent += 8;
        }
        reader->bits |= byte << (56 - reader->count);
        reader->count += 8;
    }
}

static void drop(Reader *reader, int bits) {
    reader->bits <<= bits;
    reader->count -= bits;
}

/* The next symbol, or -1. */
static int symbol(Reader *reader, const Huffman *table) {
    refill(reader);
    int entry = table->fast[reader->bits >> (64 - FAST)];
    if (entry) {
        drop(reader, entry >> 8);
        return entry & 255;
    }
    for (int length = FAST + 1; length <= 16; length++) {
        int code = (int)(reader->bits >> (64 - length));
        if (code <= table->max_code[length]) {
            drop(reader, length);
            return table->values[table->first_value[length] + code - table->min_code[length]];
        }
    }
    return -1;
}

static int signed_bits(Reader *reader, int category) {
    if (category == 0) return 0;
    int value = (int)(reader->bits >> (64 - category));
    drop(reader, category);
    return value < 1 << (category - 1) ? value - (1 << category) + 1 : value;
}

static Status read_block(Reader *reader, const Huffman *dc, const Huffman *ac, int *predictor) {
    int category = symbol(reader, dc);
    if (category < 0 || category >= CATEGORIES) return CORRUPT;
    *predictor += signed_bits(reader, category);
    if (*predictor < INT16_MIN || *predictor > INT16_MAX) return CORRUPT;
    for (int k = 1; k < 64; k++) {
        int run = symbol(reader, ac);
        if (run < 0) return CORRUPT;
        if (run % 16 == 0 && run != 0xF0) return DONE;
        k += run >> 4;
        drop(reader, run & 15);
    }
    return DONE;
}

Status read_mcu(Reader *reader, const File *file, int *predictors) {
    for (int i = 0; i < file->components; i++) {
        const Component *component = &file->component[i];
        for (int block = 0; block < component->across * component->down; block++) {
            Status status = read_block(reader, &file->dc[component->dc], &file->ac[component->ac],
                                       &predictors[i]);
            if (status != DONE) return status;
        }
    }
    return DONE;
}

/* Where the byte before `at` begins, with the zero that is stuffed behind it. */
static size_t before(const Reader *reader, size_t at, size_t scan) {
    int stuffed = at >= scan + 2 && reader->bytes[at - 1] == 0 && reader->bytes[at - 2] == 0xFF;
    return at - (stuffed ? 2 : 1);
}

uint64_t position(const Reader *reader, size_t scan) {
    size_t at = reader->at;
    int ahead = reader->count - reader->spent;
    for (; ahead > 0; ahead -= 8) at = before(reader, at, scan);
    return (uint64_t)(at - scan) * 8 + (uint64_t)(ahead < 0 ? -ahead : 0);
}
