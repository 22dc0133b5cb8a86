--- What there is to be seen of upstreams and their peers at this moment, for people and metrics.
--
-- Why: the membership says what was ordered; this adds what workers have found out since. It only
-- reads, and is never on the path of a request.

local circuit = require "tidegate.circuit"
local codec = require "tidegate.codec"
local json = require "tidegate.json"
local load = require "tidegate.load"
local policies = require "tidegate.policy"
local records = require "tidegate.records"

local ipairs = ipairs
local max = math.max
local now = ngx.now

local _M = {}


local function state_of(peer, known)
    if peer.state == codec.UP and peer.weight > 0 then
        if known.verdict and known.verdict.healthy == 0 then
            return "unhealthy"
        elseif known.ejection then
            return "ejected"
        end
    end
    return codec.names[peer.state]
end


-- Requests that are with a peer, where its upstream's policy has them counted.
local function in_flight(peer)
    return peer.cell ~= 0 and load.sum(peer.cell) or nil
end


--- The live state of a peer as the API shows it.
-- @param name, policy of its upstream
-- @param peer as `codec.decode` gives it
function _M.peer(name, policy, peer)
    local known = records.of(name, policy, peer)
    local result = {
        state = state_of(peer, known),
        failures = known.failures,
        in_flight = in_flight(peer),
    }
    if known.ejection then
        result.ejections = known.ejection.count
        result.ejected_for = max(known.ejection.until_ - now(), 0)
    end
    if known.verdict then
        result.check = {
            healthy = known.verdict.healthy == 1,
            at = known.verdict.at,
            since = known.verdict.since,
            status = known.verdict.status > 0 and known.verdict.status or nil,
        }
    elseif known.message and peer.state == codec.PROBING then
        result.check = { healthy = false }
    end
    if result.check then
        result.check.message = known.message
    end
    return result
end


--- The live state of an upstream as the API shows it; nil where there is nothing to say.
function _M.upstream(name, policy)
    return policy.circuit and { circuit = circuit.state(name) } or nil
end


--- JSON text of the `live` of a peer, cheap where nothing is known: there may be 100,000.
function _M.peer_json(name, policy, peer)
    if not policy.check and not records.has_any(name) then
        local count = in_flight(peer)
        return '{"state":"' .. codec.names[peer.state] .. '"'
            .. (count and ',"in_flight":' .. count or "") .. "}"
    end
    return json.encode(_M.peer(name, policy, peer))
end


--- How many peers of a packed upstream are in which state, by its name; `up` is always there.
-- @return table, and the state of the circuit where there is one
function _M.counts(name, blob)
    local head = codec.head(blob)
    local policy = policies.parse(codec.policy(blob, head))
    local counts = {
        up = head.up,
        draining = head.draining,
        probing = head.probing,
        idle = head.count - head.up - head.draining - head.probing,
        ejected = 0,
        unhealthy = 0,
    }
    if head.up > 0 and records.has_any(name) then
        for _, peer in ipairs(codec.decode(blob, head.up).peers) do
            local state = state_of(peer, records.of(name, policy, peer))
            if state ~= "up" then
                counts[state] = counts[state] + 1
                counts.up = counts.up - 1
            end
        end
    end
    return counts, policy.circuit and circuit.state(name)
end


return _M
