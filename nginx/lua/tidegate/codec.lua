--- An upstream as one immutable binary value, as it lies in the shared dict.
--
-- Why: a worker that meets a new version must not parse anything: records are of fixed width and
-- read in place through the FFI, so a version costs the same with 10 peers and with 10,000.
-- Peers are grouped (up, the backups first; draining, probing, idle) by the one worker that writes;
-- within a group they are sorted by id, so equal content gives equal bytes. Nothing here touches a
-- dict.

local ffi = require "ffi"
local posix = require "tidegate.posix"

local C = ffi.C
local cast = ffi.cast
local copy = ffi.copy
local crc32 = ngx.crc32_short
local ffi_new = ffi.new
local ffi_string = ffi.string
local ipairs = ipairs
local pairs = pairs
local sort = table.sort
local sub = string.sub

pcall(ffi.cdef, "int memcmp(const void *a, const void *b, size_t size);")
ffi.cdef [[
typedef struct {
    uint32_t magic;
    uint32_t count;        /* all peers */
    uint32_t up;           /* up, admitted, of weight > 0: the first in the list */
    uint32_t draining;     /* the next */
    uint32_t probing;      /* the next; what follows is idle: weight 0, or an address twice */
    uint32_t total_weight; /* of the up ones that are no backups */
    double hold;           /* seconds */
    uint16_t uniform;      /* 1: the up ones that are no backups have all the same weight */
    uint16_t version;      /* length of the writer's name for this content */
    uint32_t policy;       /* length of the policy's JSON text; both follow the peers */
    uint32_t backups;      /* of the up ones, the first so many */
    uint32_t backup_weight;
    uint32_t cell;         /* of `tidegate.load`: requests in flight; 0: not counted */
    uint32_t queue_cell;   /* requests that wait for a peer with room */
} tidegate_head_t;

typedef struct {
    double since;          /* Unix time at which it came into its present state */
    uint32_t cumulative;   /* up ones, and backups: sum of the weights up to and with this one */
    uint32_t id_offset;    /* into the text that follows the peers */
    uint32_t cell;         /* of `tidegate.load`; 0: not counted */
    uint16_t port;
    uint16_t weight;
    uint16_t id_length;
    uint8_t state;
    uint8_t family;        /* 4 or 6 */
    uint8_t backup;        /* 1: only while no other one can */
    uint8_t late;          /* 1: it joined others, and starts slowly where the policy says so */
    uint8_t address[16];
} tidegate_peer_t;
]]

local MAGIC = 0x54473033
local MARK_SIZE = 4
local HEAD_SIZE = ffi.sizeof("tidegate_head_t")
local PEER_SIZE = ffi.sizeof("tidegate_peer_t")
local ADDRESS_OFFSET = ffi.offsetof("tidegate_peer_t", "address")
local head_type = ffi.typeof("tidegate_head_t")
local peer_ptr = ffi.typeof("const tidegate_peer_t *")
local head_out = ffi.typeof("tidegate_head_t *")
local peer_out = ffi.typeof("tidegate_peer_t *")
local char_ptr = ffi.typeof("const char *")
local buffer_type = ffi.typeof("char[?]")
local uint32_box = ffi.typeof("uint32_t[?]")

local UP, DRAINING, PROBING = 1, 2, 3

local _M = {
    UP = UP,
    DRAINING = DRAINING,
    PROBING = PROBING,
    names = { [UP] = "up", [DRAINING] = "draining", [PROBING] = "probing" },
}


local function by_id(a, b)
    return a.id < b.id
end


local function sort_by_id(peers)
    for index = 2, #peers do
        if not by_id(peers[index - 1], peers[index]) then
            sort(peers, by_id)
            return
        end
    end
end


-- Moves the peers of one group from `rest` to `order`; gives those that are left. An address that
-- is already up is not taken a second time: a task that is being replaced under the same address
-- must not look draining. `backups` false leaves backups.
local function take(rest, state, ups, order, backups)
    local seen, left = {}, {}
    for _, peer in ipairs(rest) do
        local address
        if peer.state == state and peer.weight > 0 and (backups or not peer.backup) then
            address = peer.bytes .. ":" .. peer.port
        end
        if address and not seen[address] and not ups[address] then
            seen[address] = true
            order[#order + 1] = peer
        else
            left[#left + 1] = peer
        end
    end
    return left, seen
end


--- Packs an upstream.
-- @param name of it. What is packed ends with a hash of it that nobody reads: LuaJIT looks at few
--   bytes of a long string to file it, and thousands that are alike there would be filed together
-- @param upstream `{policy (JSON text), version (text), hold, peers}`; each peer
--   `{id, family, bytes, port, weight, state, since, backup, late, cell}`; `peers` gets sorted;
--   `cell` and `queue_cell` where its load is counted
-- @return the value, and the number of peers that are being probed
function _M.encode(name, upstream)
    local peers, order = upstream.peers, {}
    sort_by_id(peers)
    local regular = {}
    local others, ups = take(peers, UP, {}, regular, false)
    local rest, more = take(others, UP, ups, order, true)
    for address in pairs(more) do
        ups[address] = true
    end
    local backups = #order
    for _, peer in ipairs(regular) do
        order[#order + 1] = peer
    end
    local up = #order
    rest = take(rest, DRAINING, ups, order, true)
    local draining = #order - up
    rest = take(rest, PROBING, ups, order, true)
    local probing = #order - up - draining
    for _, peer in ipairs(rest) do
        order[#order + 1] = peer
    end
    local version = upstream.version or ""
    local text = #upstream.policy + #version
    for _, peer in ipairs(peers) do
        text = text + #peer.id
    end

    local size = HEAD_SIZE + #order * PEER_SIZE + text + MARK_SIZE
    local buffer = ffi_new(buffer_type, size)
    local head = cast(head_out, buffer)
    local records = cast(peer_out, buffer + HEAD_SIZE)
    local strings = buffer + HEAD_SIZE + #order * PEER_SIZE
    copy(strings, upstream.policy, #upstream.policy)
    copy(strings + #upstream.policy, version, #version)
    copy(buffer + size - MARK_SIZE, uint32_box(1, crc32(name)), MARK_SIZE)
    local offset, uniform = #upstream.policy + #version, 1
    local total, backup_weight = 0, 0
    for index, peer in ipairs(order) do
        local record = records[index - 1]
        if index <= backups then
            backup_weight = backup_weight + peer.weight
            record.cumulative = backup_weight
        elseif index <= up then
            total = total + peer.weight
            record.cumulative = total
            if peer.weight ~= regular[1].weight then
                uniform = 0
            end
        end
        record.since = peer.since
        record.id_offset = offset
        record.id_length = #peer.id
        record.port = peer.port
        record.weight = peer.weight
        record.state = peer.state
        record.family = peer.family
        record.backup = peer.backup and 1 or 0
        record.late = peer.late and 1 or 0
        record.cell = peer.cell or 0
        copy(record.address, peer.bytes, #peer.bytes)
        copy(strings + offset, peer.id, #peer.id)
        offset = offset + #peer.id
    end
    head.magic = MAGIC
    head.count = #order
    head.up = up
    head.draining = draining
    head.probing = probing
    head.total_weight = total
    head.hold = upstream.hold
    head.uniform = uniform
    head.policy = #upstream.policy
    head.version = #version
    head.backups = backups
    head.backup_weight = backup_weight
    head.cell = upstream.cell or 0
    head.queue_cell = upstream.queue_cell or 0
    return ffi_string(buffer, size), probing
end


--- The head of packed `blob`, a copy; nil where it is not one.
function _M.head(blob)
    if #blob < HEAD_SIZE then
        return nil
    end
    local head = head_type()
    copy(head, blob, HEAD_SIZE)
    local text = head.policy + head.version
    if head.magic ~= MAGIC or #blob < HEAD_SIZE + head.count * PEER_SIZE + text then
        return nil
    end
    return head
end


--- The peers of packed `blob`, in place, index from 0. The caller keeps `blob` referenced as long
-- as it uses them: a pointer does not keep a string from being collected.
function _M.peers(blob)
    return cast(peer_ptr, cast(char_ptr, blob) + HEAD_SIZE)
end


--- JSON text of the policy of packed `blob` with `head`.
function _M.policy(blob, head)
    local at = HEAD_SIZE + head.count * PEER_SIZE
    return sub(blob, at + 1, at + head.policy)
end


--- What the writer called the content of packed `blob` with `head`; empty if nothing.
function _M.version(blob, head)
    local at = HEAD_SIZE + head.count * PEER_SIZE + head.policy
    return sub(blob, at + 1, at + head.version)
end


--- Id of the peer at `index` of packed `blob` with `count` peers.
function _M.id(blob, count, index)
    local record = _M.peers(blob)[index]
    local at = HEAD_SIZE + count * PEER_SIZE + record.id_offset
    return sub(blob, at + 1, at + record.id_length)
end


--- Unpacks `blob` into what `encode` takes.
-- @param first only that many peers, the up ones first; nil for all
function _M.decode(blob, first)
    local head = _M.head(blob)
    local records, peers = _M.peers(blob), {}
    local strings = HEAD_SIZE + head.count * PEER_SIZE
    for index = 0, (first or head.count) - 1 do
        local record = records[index]
        local address = HEAD_SIZE + index * PEER_SIZE + ADDRESS_OFFSET
        local id = strings + record.id_offset
        peers[index + 1] = {
            family = record.family,
            port = record.port,
            weight = record.weight,
            state = record.state,
            since = record.since,
            backup = record.backup == 1,
            late = record.late == 1,
            cell = record.cell,
            bytes = sub(blob, address + 1, address + (record.family == 6 and 16 or 4)),
            id = sub(blob, id + 1, id + record.id_length),
        }
    end
    -- Reading the policy last keeps the blob, which the records point into, alive until here.
    return {
        peers = peers,
        hold = head.hold,
        cell = head.cell,
        queue_cell = head.queue_cell,
        version = _M.version(blob, head),
        policy = _M.policy(blob, head),
    }
end


--- Index of the first of `count` peers with an address and port; nil where there is none.
-- @param bytes string
function _M.find(peers, count, family, bytes, port)
    for index = 0, count - 1 do
        local peer = peers[index]
        if peer.port == port and peer.family == family
                and C.memcmp(peer.address, bytes, #bytes) == 0 then
            return index
        end
    end
    return nil
end


--- How a peer is to be named to nginx: an IPv6 address goes in brackets.
-- @param bytes string or pointer
function _M.host(family, bytes)
    local text = posix.format_address(family, bytes)
    return family == 6 and "[" .. text .. "]" or text
end


return _M
