/* From the bytes of a JPEG file to resized RGB pixels, of which only the needed ones are decoded;
 * or from its pixels, where they are at hand.
 *
 * Pixels are to the bit those of the whole file's decoding with libjpeg-turbo's defaults: exact
 * integer transform, interpolated colour. Only its public interface is used. */

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jerror.h>
#include <jpeglib.h>

#include "native.h"

#ifndef JCS_EXTENSIONS
#error "libjpeg-turbo's headers are needed, not those of another libjpeg"
#endif

enum { ROWS = 8 };

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf jump;
    char message[MESSAGE_LENGTH];
} Errors;

typedef struct {
    uint8_t *bytes;
    size_t capacity;
} Buffer;

struct Decoder {
    struct jpeg_decompress_struct jpeg;
    Errors errors;
    Buffer rows, middle;
    Region region;
};

static void give_up(j_common_ptr jpeg) {
    Errors *errors = (Errors *)jpeg->err;
    char text[JMSG_LENGTH_MAX];
    errors->base.format_message(jpeg, text);
    snprintf(errors->message, sizeof errors->message, "%.*s", MESSAGE_LENGTH - 1, text);
    longjmp(errors->jump, 1);
}

/* A warning means wrong pixels: whoever asked shall know. */
static void judge(j_common_ptr jpeg, int level) {
    if (level < 0) give_up(jpeg);
}

static void say_nothing(j_common_ptr jpeg) { (void)jpeg; }

Decoder *decoder_create(void) {
    Decoder *volatile decoder = calloc(1, sizeof *decoder);
    if (decoder == NULL) return NULL;
    decoder->jpeg.err = jpeg_std_error(&decoder->errors.base);
    decoder->errors.base.error_exit = give_up;
    decoder->errors.base.emit_message = judge;
    decoder->errors.base.output_message = say_nothing;
    if (setjmp(decoder->errors.jump)) {
        free(decoder);
        return NULL;
    }
    jpeg_create_decompress(&decoder->jpeg);
    return decoder;
}

void decoder_destroy(Decoder *decoder) {
    if (decoder == NULL) return;
    jpeg_destroy_decompress(&decoder->jpeg);
    free(decoder->rows.bytes);
    free(decoder->middle.bytes);
    free(decoder->region.bytes);
    free(decoder);
}

/* Room for `size` bytes; what was in the buffer is lost. */
static Status reserve(Buffer *buffer, size_t size) {
    if (buffer->capacity >= size) return DONE;
    free(buffer->bytes);
    buffer->bytes = calloc(size, 1);
    buffer->capacity = buffer->bytes == NULL ? 0 : size;
    return buffer->bytes == NULL ? NO_MEMORY : DONE;
}

static Status read_header(Decoder *decoder, const uint8_t *bytes, size_t size) {
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    jpeg_mem_src(jpeg, bytes, (unsigned long)size);
    jpeg_read_header(jpeg, TRUE);
    int colors = jpeg->jpeg_color_space;
    int known = colors == JCS_GRAYSCALE || colors == JCS_YCbCr || colors == JCS_RGB;
    return known && jpeg->data_precision == 8 ? DONE : UNSUPPORTED;
}

/* Decode the rows and columns that `needed` (in decoded pixels) says and shrink each row. */
static Status decode_rows(Decoder *decoder, Box needed, int denominator, const Axis *across,
                          int flip) {
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg->scale_num = 1;
    jpeg->scale_denom = (unsigned)denominator;
    jpeg_start_decompress(jpeg);
    int right = needed.right + MARGIN;
    if (right > (int)jpeg->output_width) right = (int)jpeg->output_width;
    JDIMENSION left = needed.left < MARGIN ? 0 : (JDIMENSION)(needed.left - MARGIN);
    JDIMENSION width = (JDIMENSION)right - left;
    if (needed.right > right || needed.bottom > (int)jpeg->output_height) return CORRUPT;
    if (width < jpeg->output_width) jpeg_crop_scanline(jpeg, &left, &width);
    size_t stride = ((size_t)width + (size_t)across->taps + 2) * PIXEL;
    if (reserve(&decoder->rows, stride * ROWS) != DONE) return NO_MEMORY;
    JSAMPROW rows[ROWS];
    const uint8_t *inputs[ROWS];
    for (int i = 0; i < ROWS; i++) {
        rows[i] = decoder->rows.bytes + (size_t)i * stride;
        inputs[i] = rows[i] + (size_t)(needed.left - (int)left) * PIXEL;
    }
    if (needed.top > 0 &&
        jpeg_skip_scanlines(jpeg, (JDIMENSION)needed.top) != (JDIMENSION)needed.top)
        return CORRUPT;
    size_t length = (size_t)across->size * 3;
    uint8_t *out = decoder->middle.bytes;
    for (int row = needed.top; row < needed.bottom;) {
        int wanted = needed.bottom - row < ROWS ? needed.bottom - row : ROWS, got = 0;
        while (got < wanted)
            got += (int)jpeg_read_scanlines(jpeg, rows + got, (JDIMENSION)(wanted - got));
        resample_rows(across, inputs, got, out, length, flip);
        out += (size_t)got * length;
        row += got;
    }
    return DONE;
}

/* The same from pixels that are at hand. */
static Status shrink_rows(Decoder *decoder, const Job *job, Box needed, const Axis *across) {
    size_t width = (size_t)(needed.right - needed.left), length = (size_t)across->size * 3;
    size_t stride = (width + (size_t)across->taps + 2) * PIXEL;
    if (reserve(&decoder->rows, stride * ROWS) != DONE) return NO_MEMORY;
    const uint8_t *inputs[ROWS];
    for (int i = 0; i < ROWS; i++) inputs[i] = decoder->rows.bytes + (size_t)i * stride;
    uint8_t *out = decoder->middle.bytes;
    for (int row = needed.top; row < needed.bottom; row += ROWS) {
        int count = needed.bottom - row < ROWS ? needed.bottom - row : ROWS;
        for (int i = 0; i < count; i++) {
            size_t first = (size_t)(row + i) * (size_t)job->image_width + (size_t)needed.left;
            const uint8_t *rgb = job->bytes + 3 * first;
            uint8_t *rgbx = decoder->rows.bytes + (size_t)i * stride;
            for (size_t x = 0; x < width; x++) memcpy(rgbx + x * PIXEL, rgb + 3 * x, 3);
        }
        resample_rows(across, inputs, count, out, length, job->flip);
        out += (size_t)count * length;
    }
    return DONE;
}

/* How much smaller the image may be decoded and still not be smaller than the result. */
static int denominator_of(const Job *job) {
    int width = job->box.right - job->box.left, height = job->box.bottom - job->box.top;
    int denominator = 1;
    if (job->decoded) return 1;
    while (job->reduce && denominator < 8 && width / (2 * denominator) >= job->width &&
           height / (2 * denominator) >= job->height)
        denominator *= 2;
    return denominator;
}

static Box times(Box box, int factor, int width, int height) {
    Box out = {box.left * factor, box.top * factor, box.right * factor, box.bottom * factor};
    if (out.right > width) out.right = width;
    if (out.bottom > height) out.bottom = height;
    return out;
}

/* Read the header of the smallest file that holds `needed`, and move `needed` into it. */
static Status open_region(Decoder *decoder, const Job *job, Box *needed, int denominator) {
    Region *region = &decoder->region;
    Box pixels = times(*needed, denominator, job->image_width, job->image_height);
    if (job->index_size == 0 || region_extract(job, pixels, region) != DONE) return UNSUPPORTED;
    Status status = read_header(decoder, region->bytes, region->size);
    if (status != DONE) return status;
    int right = (region->left - pixels.left) / denominator;
    int down = (region->top - pixels.top) / denominator;
    *needed = (Box){needed->left + right, needed->top + down, needed->right + right,
                    needed->bottom + down};
    return DONE;
}

static Status open_whole(Decoder *decoder, const Job *job) {
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    Status status = read_header(decoder, job->bytes, job->size);
    if (status != DONE) return status;
    if ((int)jpeg->image_width == job->image_width && (int)jpeg->image_height == job->image_height)
        return DONE;
    snprintf(decoder->errors.message, MESSAGE_LENGTH, "%u x %u pixels instead of %d x %d",
             jpeg->image_width, jpeg->image_height, job->image_width, job->image_height);
    return CORRUPT;
}

/* Fill decoder->middle with the needed rows, shrunk along the columns: from the whole file, or from
 * the part of it that its index leads to. */
static Status decode_from(Decoder *decoder, const Job *job, Box needed, int denominator,
                          const Axis *across, int whole) {
    volatile Status status = CORRUPT;
    if (setjmp(decoder->errors.jump) == 0) {
        status = whole ? open_whole(decoder, job) : open_region(decoder, job, &needed, denominator);
        if (status == DONE) status = decode_rows(decoder, needed, denominator, across, job->flip);
    } else {
        status = CORRUPT;
    }
    jpeg_abort_decompress(&decoder->jpeg);
    return status;
}

static Status decode_needed(Decoder *decoder, const Job *job, Box needed, int denominator,
                            const Axis *across) {
    if (job->decoded) return shrink_rows(decoder, job, needed, across);
    Status status = decode_from(decoder, job, needed, denominator, across, 0);
    return status == DONE ? DONE : decode_from(decoder, job, needed, denominator, across, 1);
}

Status decode_job(Decoder *decoder, const Job *job, char message[MESSAGE_LENGTH]) {
    Axis across, down = {0};
    int denominator = denominator_of(job);
    double scale = 1.0 / denominator;
    Box box = job->box, window = job->window;
    decoder->errors.message[0] = 0;
    Status status = axis_create(&across, box.left * scale, (box.right - box.left) * scale,
                                job->width, window.left, window.right, job->kernel);
    if (status == DONE)
        status = axis_create(&down, box.top * scale, (box.bottom - box.top) * scale, job->height,
                             window.top, window.bottom, job->kernel);
    if (status == DONE) {
        Box needed = {across.begin, down.begin, across.end, down.end};
        size_t length = (size_t)across.size * 3, rows = (size_t)(down.end - down.begin);
        status = reserve(&decoder->middle, length * rows);
        if (status == DONE) status = decode_needed(decoder, job, needed, denominator, &across);
        if (status == DONE) resample_columns(&down, decoder->middle.bytes, length, job->out);
    }
    memcpy(message, decoder->errors.message, MESSAGE_LENGTH);
    axis_destroy(&across);
    axis_destroy(&down);
    return status;
}

Status decode_size(Decoder *decoder, const uint8_t *bytes, size_t size, int *width, int *height,
                   char message[MESSAGE_LENGTH]) {
    volatile Status status = CORRUPT;
    decoder->errors.message[0] = 0;
    if (setjmp(decoder->errors.jump) == 0) {
        status = read_header(decoder, bytes, size);
        *width = (int)decoder->jpeg.image_width;
        *height = (int)decoder->jpeg.image_height;
    }
    jpeg_abort_decompress(&decoder->jpeg);
    memcpy(message, decoder->errors.message, MESSAGE_LENGTH);
    return status;
}

/* Whether a warning is of bytes too many, or of fields that nothing hangs on, as many a camera
 * writes them. Others say that a part of the image is missing or cannot be read. */
static int is_harmless(int warning) {
    return warning == JWRN_EXTRANEOUS_DATA || warning == JWRN_ADOBE_XFORM ||
           warning == JWRN_JFIF_MAJOR || warning == JWRN_NOT_SEQUENTIAL;
}

static void judge_damage(j_common_ptr jpeg, int level) {
    if (level < 0 && !is_harmless(jpeg->err->msg_code)) give_up(jpeg);
}

/* Decode all rows at an eighth of their size: every bit is read and next to nothing computed. */
static Status read_through(Decoder *decoder, const uint8_t *bytes, size_t size) {
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    jpeg_mem_src(jpeg, bytes, (unsigned long)size);
    jpeg_read_header(jpeg, TRUE);
    jpeg->out_color_space =
        jpeg->jpeg_color_space == JCS_YCbCr ? JCS_GRAYSCALE : jpeg->jpeg_color_space;
    jpeg->scale_num = 1;
    jpeg->scale_denom = 8;
    jpeg_start_decompress(jpeg);
    size_t length = (size_t)jpeg->output_width * (size_t)jpeg->output_components;
    if (reserve(&decoder->rows, length) != DONE) return NO_MEMORY;
    JSAMPROW row = decoder->rows.bytes;
    while (jpeg->output_scanline < jpeg->output_height) jpeg_read_scanlines(jpeg, &row, 1);
    jpeg_finish_decompress(jpeg);
    return DONE;
}

Status decode_check(Decoder *decoder, const uint8_t *bytes, size_t size,
                    char message[MESSAGE_LENGTH]) {
    volatile Status status = CORRUPT;
    decoder->errors.message[0] = 0;
    decoder->errors.base.emit_message = judge_damage;
    if (setjmp(decoder->errors.jump) == 0) status = read_through(decoder, bytes, size);
    jpeg_abort_decompress(&decoder->jpeg);
    decoder->errors.base.emit_message = judge;
    memcpy(message, decoder->errors.message, MESSAGE_LENGTH);
    return status;
}
