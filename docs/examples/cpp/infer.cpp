// One inference over AIP1 with libzmq's C API. See docs/wire-protocol.md.
//
//   apt-get install g++ libzmq3-dev
//   g++ -std=c++17 -O2 -o infer infer.cpp -lzmq
//   ./infer tcp://127.0.0.1:5570 digits image 1,28,28,1 [FILE of raw little-endian float32]
//
// It builds and searches JSON as text to need no other library; a real program uses its JSON library.

#include <zmq.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

static const int timeout_ms = 2000;

static int fail(const std::string &what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    return 1;
}

static std::vector<float> read_input(const char *file, size_t count) {
    std::vector<float> values(count);
    if (!file) {
        for (size_t i = 0; i < count; i++) values[i] = static_cast<float>(i);
        return values;
    }
    std::ifstream stream(file, std::ios::binary);
    stream.read(reinterpret_cast<char *>(values.data()), static_cast<std::streamsize>(count * sizeof(float)));
    if (stream.gcount() != static_cast<std::streamsize>(count * sizeof(float))) values.clear();
    return values;
}

static bool receive(void *socket, std::vector<std::string> &frames) {
    int more = 1;
    while (more) {
        zmq_msg_t part;
        zmq_msg_init(&part);
        if (zmq_msg_recv(&part, socket, 0) < 0) {
            zmq_msg_close(&part);
            return false;  // EAGAIN: ZMQ_RCVTIMEO has passed
        }
        frames.emplace_back(static_cast<const char *>(zmq_msg_data(&part)), zmq_msg_size(&part));
        more = zmq_msg_more(&part);
        zmq_msg_close(&part);
    }
    return true;
}

int main(int argc, char **argv) {
    if (argc < 5) return fail("usage: infer ENDPOINT MODEL TENSOR SHAPE [FILE]");
    const std::string endpoint = argv[1], model = argv[2], tensor = argv[3], shape = argv[4];

    size_t count = 1;
    std::stringstream sizes(shape);
    for (std::string size; std::getline(sizes, size, ',');) count *= std::stoul(size);
    const std::vector<float> input = read_input(argc > 5 ? argv[5] : nullptr, count);
    if (input.size() != count) return fail("the file is shorter than the shape says");

    void *context = zmq_ctx_new();
    void *socket = zmq_socket(context, ZMQ_DEALER);
    const int zero = 0, one = 1;
    zmq_setsockopt(socket, ZMQ_LINGER, &zero, sizeof zero);
    zmq_setsockopt(socket, ZMQ_IMMEDIATE, &one, sizeof one);  // no queueing for a daemon that is not there
    zmq_setsockopt(socket, ZMQ_SNDTIMEO, &timeout_ms, sizeof timeout_ms);
    zmq_setsockopt(socket, ZMQ_RCVTIMEO, &timeout_ms, sizeof timeout_ms);
    if (zmq_connect(socket, endpoint.c_str()) != 0) return fail(zmq_strerror(zmq_errno()));

    const std::string header = "{\"op\":\"infer\",\"id\":\"1\",\"model\":\"" + model + "\",\"ttl_ms\":" +
                               std::to_string(timeout_ms) + ",\"inputs\":[{\"name\":\"" + tensor +
                               "\",\"datatype\":\"FP32\",\"shape\":[" + shape + "],\"frame\":0}]}";
    if (zmq_send(socket, "AIP1", 4, ZMQ_SNDMORE) < 0) return fail("no appliance answers at " + endpoint);
    zmq_send(socket, header.data(), header.size(), ZMQ_SNDMORE);
    zmq_send(socket, input.data(), input.size() * sizeof(float), 0);

    std::vector<std::string> reply;
    if (!receive(socket, reply)) return fail("no answer in time");
    if (reply.size() < 2 || reply[0] != "AIP1") return fail("this is no AIP1 reply");
    std::printf("%s\n", reply[1].c_str());
    const bool ok = reply[1].find("\"ok\":true") != std::string::npos;
    for (size_t frame = 2; ok && frame < reply.size(); frame++) {
        for (size_t at = 0; at + sizeof(float) <= reply[frame].size(); at += sizeof(float)) {
            float value;  // copied, because received frames have no alignment
            std::memcpy(&value, reply[frame].data() + at, sizeof value);
            std::printf("%g ", static_cast<double>(value));
        }
        std::printf("\n");
    }
    zmq_close(socket);
    zmq_ctx_term(context);
    return ok ? 0 : 1;
}
